PS1='node:\w\$ '
