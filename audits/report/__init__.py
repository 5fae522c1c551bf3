"""Reports as pages, Markdown and tables on the terminal, and their files."""
