"""One adapter per library, imported when a card first needs it."""
