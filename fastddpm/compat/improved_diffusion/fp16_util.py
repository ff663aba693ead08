"""Not here: half precision is by autocast, over float32 weights."""

raise ImportError(
    "fastddpm.compat.improved_diffusion: expected a module that is there, got fp16_util; half precision is "
    "UNetModel.convert_to_fp16 and TrainLoop(use_fp16=True), which keep float32 weights by themselves"
)
