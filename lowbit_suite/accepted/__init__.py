"""The accepted numbers and their evidence: comparing, accepting and repeating them."""
