"""The main job: grow a network that is too small while it trains, and compare it with networks that do not grow."""
