"""What a trained model is worth, without a download (`by_source`)."""
