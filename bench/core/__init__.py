"""What an operation, a method and a shape are; who is here to be measured. Knows no operation."""
