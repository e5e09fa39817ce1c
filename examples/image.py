"""Images from the bundled pipeline, with and without acceleration. Runs anywhere: ``python examples/image.py``.

For a model of your own, give ``load`` a hub id or a folder; a pipeline you already have goes straight into
``diffaccel.accelerate(pipe, "balanced")``.
"""

import diffaccel

prompt = "a large red circle on the left on a gray background"
wrapped = diffaccel.pipelines.load("bundled:image")

original = wrapped.generate_image(prompt, seed=0, out="circle-original.png")[0]

with diffaccel.accelerate(wrapped.pipe, "balanced") as accel:
    wrapped.generate_image(prompt, seed=0, out="circle-accelerated.png")
    print(accel.report())

# Leaving the block restored the pipeline to the bit.
again = wrapped.generate_image(prompt, seed=0)[0]
print("restored to the bit:", again.tobytes() == original.tobytes())
