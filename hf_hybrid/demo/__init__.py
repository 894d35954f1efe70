"""The demo: a real pretrained model, a real task, one command. Also what the benchmarks and the slow tests use."""
