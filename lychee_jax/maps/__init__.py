"""Head maps from elsewhere: those that the package ships, and those made of what other projects publish."""
