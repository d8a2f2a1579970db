"""A cache flows in; what it holds, how close it comes to its teacher, and whether every byte is right flow out."""
