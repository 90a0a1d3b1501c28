"""The pool: how a page is laid out, who owns which, and which are kept for prompts to come."""
