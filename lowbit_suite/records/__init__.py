"""The results of a notebook: numbers, tables, and its trainings as lines of a journal."""
