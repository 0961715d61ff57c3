"""What needs a GPU or its compilers."""
