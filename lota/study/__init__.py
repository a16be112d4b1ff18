"""The study: evidence about tickets that anyone can rerun, made of the product alone."""
