"""A run on disk: who owns it, its checkpoints, how it ended, where its weights come from."""
