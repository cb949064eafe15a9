"""Every family of causal language models that transformers builds small, tried one after the other; `make families`."""
