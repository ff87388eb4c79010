"""Finished models as users meet them: text, exported folders, the report page."""
