"""The operations: for each its inputs, our method, plain PyTorch and the peers."""
