"""Where a pruned model runs: kernels, runtimes, and what each of them gains. The only place that knows them."""
