"""What a training is made of: its settings, groups, losses, trainer and checkpoints. `rankmamba.train` puts them together."""
