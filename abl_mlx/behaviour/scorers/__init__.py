"""Scorers: figures of behaviours other than refusal, from replies to prompts of their own."""
