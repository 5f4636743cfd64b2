"""How are retrieval heads chosen best? One command trains, compares and reports, and resumes row by row."""
