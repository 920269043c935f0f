"""What protects what leaves, and distrusts what arrives."""
