"""The database's versions, oldest first in ``versions/``, and how they are applied."""
