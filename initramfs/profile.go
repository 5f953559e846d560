package initramfs

// A Profile names the hardware an initramfs is for.
type Profile string

// The profiles.
const (
	VM    Profile = "vm"    // what hypervisors show: small, quick to boot
	Metal Profile = "metal" // what a rack or a desk may hold
)

// filesystems and their code pages have no device that would announce them, so
// the agent loads them by name, in this order.
var filesystems = []string{"ext4", "vfat", "nls_cp437", "nls_ascii", "nls_utf8", "efivarfs"}

// profiles lists the modules that are packed; what they depend on follows.
// Entries with a slash are directories below /lib/modules/VERSION/kernel. No
// kernel has them all: Debian's cloud kernel has no e1000 and has ext4 built in.
var profiles = map[Profile][]string{
	VM: {
		"virtio_pci", "virtio_mmio", "virtio_net", "virtio_blk", "virtio_scsi", "virtio_rng",
		"e1000", "e1000e", "vmxnet3", "hv_netvsc", "xen_netfront", "ena", "gve",
		"ahci", "ata_piix", "sd_mod", "nvme", "vmw_pvscsi", "hv_storvsc", "xen_blkfront",
	},
	Metal: {
		"virtio_pci", "virtio_net", "virtio_blk", "virtio_scsi", "virtio_rng",
		"drivers/net/ethernet", "drivers/net/phy", "drivers/net/usb",
		"drivers/ata", "drivers/nvme/host", "drivers/scsi", "drivers/message/fusion",
		"drivers/mmc", "drivers/usb/host", "drivers/usb/storage", "drivers/hid/usbhid",
		"hid_generic", "xfs", "btrfs", "isofs",
	},
}
