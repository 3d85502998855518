"""denoisers"""
