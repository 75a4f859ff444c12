"""A dataset becomes a trained run, its evaluation and masks; never knows Ray."""
