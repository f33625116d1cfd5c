"""The wrapped model: wrap and unwrap, MorphableModel, save and load, export."""
