"""A short video from the bundled pipeline under a plan written out. Runs anywhere: ``python examples/video.py``."""

import diffaccel

plan = diffaccel.Plan(
    caching=diffaccel.StepCache(
        policy="easy", threshold=0.05
    ),  # skip denoiser calls that can be told from earlier ones
    name="my plan",
)
plan.save("plans/mine")  # a folder with plan.json; load it by its path, here and on the command line

wrapped = diffaccel.pipelines.load("bundled:video", plan="plans/mine")
frames = wrapped.generate_video(
    "a small yellow square moving left on a black background", seed=1, out="square.mp4", fps=8
)[0]
print(f"square.mp4: {len(frames)} frames of {frames[0].width} x {frames[0].height}")
print(wrapped.accel.report())
