"""From messages to batches: the processor, the Scenes world, sources and their mixture."""
