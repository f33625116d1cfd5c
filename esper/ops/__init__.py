"""Operations: one schema each, several backends, one registry that picks."""
