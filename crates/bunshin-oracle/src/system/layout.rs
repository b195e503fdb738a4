//! Where everything lies in the guest's memory, and how cases and records
//! are laid out. Physical addresses; the harness sees them at [`HALF`] above.
//!
//! | gpa        | what                                                    |
//! |------------|---------------------------------------------------------|
//! | 0x1000     | mailbox                                                 |
//! | 0x2000     | registers of the interrupted code, harness stacks       |
//! | 0x6000     | two IDTs: all on IST 1, and none but #DF                |
//! | 0x8000     | the way from protected to long mode                     |
//! | 0x9000     | the case's GDT twice, LDT, TSS twice                    |
//! | 0xa000     | GDT while booting, operands of LGDT and LIDT            |
//! | 0x1_0000   | the harness                                             |
//! | 0x2_0000   | tables that map the harness                             |
//! | 0x3_0000   | the case's two sets of tables: PML4, PDPT, PD, PT       |
//! | 0x4_0000   | the case's code, four data pages, two stacks            |
//! | 0x5_0000   | what data pages and stacks hold at first                |
//! | 0x20_0000  | cases                                                   |
//! | 0x40_0000  | log                                                     |
//! | 0xc0_0000  | a large page of the case                                |

/// Bytes of RAM.
pub const RAM: u64 = 16 << 20;
/// What the harness adds to physical addresses.
pub const HALF: u64 = 0xffff_8000_0000_0000;

/// Counter of batches that the host wants done.
pub const GO: u64 = 0x1000;
/// Counter of batches that are done.
pub const DONE: u64 = 0x1008;
/// Cases in the batch.
pub const COUNT: u64 = 0x1010;
/// Case that runs or comes next.
pub const INDEX: u64 = 0x1018;
/// 1 while a case runs.
pub const RUNNING: u64 = 0x1020;
/// Records in the log.
pub const LOGGED: u64 = 0x1028;
/// Exceptions of this case.
pub const CAUGHT: u64 = 0x1030;
/// Offset of the first byte behind the case's slots.
pub const END: u64 = 0x1038;
/// Vector of the exception being recorded.
pub const VECTOR: u64 = 0x1040;
/// Ranges that the final record sums up, as address and words, 0 ends a group.
pub const RANGES: u64 = 0x1100;

/// The sixteen general registers of the interrupted code.
pub const SAVE: u64 = 0x2000;
/// Top of the harness's stack.
pub const STACK_TOP: u64 = 0x3000;
/// Top of the stack of IST 1.
pub const IST1: u64 = 0x4000;
/// Top of the stack of IST 2.
pub const IST2: u64 = 0x5000;
/// IDT whose gates all use IST 1.
pub const IDT: u64 = 0x6000;
/// IDT whose gates use no IST, but for #DF.
pub const IDT_PLAIN: u64 = 0x6400;
/// Vectors in an IDT.
pub const VECTORS: u64 = 0x30;
/// 32-bit code that enters long mode.
pub const BOOT: u64 = 0x8000;
/// The case's GDT.
pub const GDT: u64 = 0x9000;
/// Its copy, which LGDT may choose.
pub const GDT_COPY: u64 = 0x9200;
/// The case's LDT.
pub const LDT: u64 = 0x9400;
/// The case's TSS.
pub const TSS: u64 = 0x9600;
/// Another TSS that LTR may choose.
pub const TSS_OTHER: u64 = 0x9800;
/// GDT of the boot.
pub const BOOT_GDT: u64 = 0xa000;
/// Operands of LGDT and LIDT, 16 bytes each: GDT, copy, IDT, plain IDT.
pub const OPERANDS: u64 = 0xa100;
/// The harness.
pub const HARNESS: u64 = 0x1_0000;
/// PML4 that maps RAM low and high.
pub const BOOT_ROOT: u64 = 0x2_0000;
/// PDPT of the upper half, which all roots share.
pub const HIGH: u64 = 0x2_3000;
/// First of the case's two sets of tables; each is PML4, PDPT, PD, PT.
pub const TABLES: [u64; 2] = [0x3_0000, 0x3_4000];
/// The case's code.
pub const CODE: u64 = 0x4_0000;
/// Four data pages, supervisor stack, user stack.
pub const PAGES: u64 = 0x4_1000;
/// What those hold at first, the same for each.
pub const TEMPLATE: u64 = 0x5_0000;
/// Cases of a batch.
pub const CASES: u64 = 0x20_0000;
/// Log of a batch.
pub const LOG: u64 = 0x40_0000;
/// A large page for the case.
pub const LARGE: u64 = 0xc0_0000;

/// First virtual address of the case's pages.
pub const WINDOW: u64 = 0x1000_0000;
/// Entries of a page table that the case chooses.
pub const ENTRIES: usize = 16;
/// Virtual address of the code as a user page.
pub const CODE_USER: u64 = WINDOW;
/// Virtual address of the code as a supervisor page.
pub const CODE_SUPERVISOR: u64 = WINDOW + 0x1000;
/// First of the four data pages.
pub const DATA: u64 = WINDOW + 0x2000;
/// Supervisor stack.
pub const STACK0: u64 = WINDOW + 0x6000;
/// User stack.
pub const STACK3: u64 = WINDOW + 0x7000;
/// The page table that maps the window, to change it.
pub const TABLE: u64 = WINDOW + 0x8000;
/// A large page.
pub const LARGE_PAGE: u64 = WINDOW + 0x20_0000;

/// Bytes of a slot.
pub const SLOT: u64 = 32;
/// Slots of a case at most; one more ends it.
pub const SLOTS: usize = 15;
/// Cases in a batch at most.
pub const BATCH: usize = 256;
/// Words of a record in the log.
pub const RECORD: usize = 40;
/// Exceptions that are recorded of one case.
pub const MOST: u64 = 40;
/// Port that tells an engine's owner that a batch is done.
pub const PORT: u16 = 0x5c0;

/// Selector of 64-bit supervisor code.
pub const KERNEL_CS: u64 = 0x08;
/// Selector of supervisor data.
pub const KERNEL_SS: u64 = 0x10;
/// Selector of 32-bit user code.
pub const USER_CS32: u64 = 0x1b;
/// Selector of user data.
pub const USER_SS: u64 = 0x23;
/// Selector of 64-bit user code.
pub const USER_CS: u64 = 0x2b;
/// Selector of the TSS.
pub const TR: u64 = 0x30;
/// Selector of the LDT.
pub const LDTR: u64 = 0x40;
/// Selector of the other TSS.
pub const TR_OTHER: u64 = 0x50;
/// First selector of the case's own descriptors.
pub const OWN: u64 = 0x60;

/// PE MP ET NE WP PG.
pub const CR0: u64 = 0x8001_0033;
/// PAE OSFXSR OSXMMEXCPT OSXSAVE.
pub const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 18;
/// SCE LME NXE; LMA follows.
pub const EFER: u64 = 0x901;

/// Tag of the last record of a case.
pub const FINAL: u64 = 0x100;
/// Tag of a case that ended in a reset.
pub const LOST: u64 = 0x200;
