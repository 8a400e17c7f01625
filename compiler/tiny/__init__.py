"""wan-tiny: a tiny, complete, trained text-to-video pipeline, its synthetic world, and an objective scorer."""
