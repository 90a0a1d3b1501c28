"""What an adapter may train beside its factors: whole modules (modules_to_save), and single words' rows."""
