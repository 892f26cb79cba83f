"""Results for people: tables, cards, pages, figures and what lies beside an output."""
