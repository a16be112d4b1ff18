"""Programs that measure. A regular package, so that no installed one of this name is found in its place."""
