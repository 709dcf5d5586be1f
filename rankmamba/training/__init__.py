"""The parts of a training: settings, groups, losses, trainer and checkpoints. `rankmamba.train` puts them together."""
