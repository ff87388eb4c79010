"""The report page: what lies on disk (gather), charts (charts), one self-contained page (page)."""
