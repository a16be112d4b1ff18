"""Programs that know nothing of lota, started so that a block is open around their training."""
