"""UniDetox: weights detoxified by fine-tuning on texts that a toxic twin of a model finds unlikely."""
