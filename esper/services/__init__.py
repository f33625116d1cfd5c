"""Programs beside the training process: Tezzeret compiles blueprints into artifacts."""
