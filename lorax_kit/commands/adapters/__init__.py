"""What is done with one adapter: trained, measured, asked, exchanged, merged."""
