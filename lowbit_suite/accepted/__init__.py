"""The accepted numbers and their evidence: comparing with them, accepting new ones, running one again."""
