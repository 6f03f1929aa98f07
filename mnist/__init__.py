"""Train and evaluate a five-layer MLP on MNIST as a distributed batch job."""
