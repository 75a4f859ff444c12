"""Shows people what a run stored: plots, tables, words and the HTML report."""
