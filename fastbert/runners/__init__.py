"""Ways to run a whole model: CUDA graphs of inference and training steps, prepacked weights."""
