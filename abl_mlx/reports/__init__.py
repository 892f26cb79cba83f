"""Reports from records: tables, model cards, pages, figures, and companion files of outputs."""
