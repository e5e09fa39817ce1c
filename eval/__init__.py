"""Measures what an acceleration gains and what it costs. Import as ``diffaccel.eval``."""
