"""What tests of every level share."""
