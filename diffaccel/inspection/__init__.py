"""What a model consists of and where its parameters, operations, time and memory go."""
