"""What a trained model is worth: on its own held-out text, and on benchmarks."""
