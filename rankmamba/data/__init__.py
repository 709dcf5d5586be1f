"""Where texts and weights come from, and the files they lie in. `rankmamba.collection` loads a collection by its name."""
