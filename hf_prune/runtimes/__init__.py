"""Where a pruned model runs: the only package that knows kernels and runtimes."""
