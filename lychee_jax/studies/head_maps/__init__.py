"""Which way of choosing retrieval heads is best? One command trains, compares and reports, and resumes row by row."""
